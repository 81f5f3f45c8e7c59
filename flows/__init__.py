"""What a user runs, in what order: the command line, the search loop, the report."""
