"""The table of merge methods: names, parameters, papers and what each needs. No mathematics, no recipes."""
