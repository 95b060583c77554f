"""Hugging Face checkpoints: out, as Llama."""
