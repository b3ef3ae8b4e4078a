"""How the verbs tell their results: on terminals, as JSON, as pages."""
