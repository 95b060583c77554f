"""The trunk: a Llama-style decoder whose layers are stacked and scanned in training and unrolled in decoding."""
