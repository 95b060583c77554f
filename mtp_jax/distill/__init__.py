"""Data that is made with a model: its own answers, and its hidden states."""
