"""What a run looks like to a person: tables, plots, pictures of the kept tokens, and where it ran."""
