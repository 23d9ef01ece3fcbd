"""What feed-forward networks do to visual tokens, and what skipping them changes."""
