"""Claims of the paper (arXiv 2410.17765): each confirmed, not confirmed or undecided by the results of the recipes.

python -m experiments.claims experiments/results/*.json --out reports/claims
"""
