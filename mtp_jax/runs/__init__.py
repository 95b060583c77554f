"""Run directories: layout, checkpoints, the manifest, and the way back from them."""
