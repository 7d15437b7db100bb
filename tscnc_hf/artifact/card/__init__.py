"""The model card: tables, figures, formatting."""
