"""The model card: tables, figures, words."""
