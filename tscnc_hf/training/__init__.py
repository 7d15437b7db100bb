"""The only room that knows Trainer."""
