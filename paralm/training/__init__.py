"""Training: one loop, one engine (DeepSpeed), checkpoints as fragments, a run as a folder."""
