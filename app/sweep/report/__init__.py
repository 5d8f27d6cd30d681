"""The tables, plots and HTML page of a sweep."""
