"""The bottom floor: schema, composition, checks and the safe build. Never imports torch itself."""
