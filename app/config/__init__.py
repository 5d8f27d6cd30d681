"""Configuration: schema, composition, validation, instantiation. Importing it never loads torch."""
