"""The tables, plots and page of a sweep."""
