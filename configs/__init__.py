"""Settings files, and what reads them: JSON, then key=value, then pydantic."""
