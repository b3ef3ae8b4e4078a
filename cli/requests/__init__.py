"""From a verb's options and files to what is planned: problems, captured models, teams and their degrees, branches."""
