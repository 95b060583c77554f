"""Lossless decoding, several tokens per forward pass, in one compiled loop.

An iteration is one forward of k + 1 tokens, [last committed, d_1 .. d_k], at each row's own positions; the target
chooses a token at every position; drafts are accepted while they agree with it, and the first token that does not
is the target's own, so every live row commits at least one. The head, conditioned on that token, drafts the next k.
With k = 0 the same code is plain autoregressive decoding, one token wide.
"""
