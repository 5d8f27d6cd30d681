"""Models for use in configurations. Of this project they import `app.runtime` only."""
