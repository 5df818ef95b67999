"""The same functions in plain array-API code: fallback, oracle and documentation."""
