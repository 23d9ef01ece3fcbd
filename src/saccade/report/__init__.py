"""Present runs to people: tables, plots, pictures of the kept tokens, and the environment."""
