"""The mathematics: pure functions and small modules over torch, nothing of transformers."""
