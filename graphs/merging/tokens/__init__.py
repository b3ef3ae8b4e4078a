"""The vocabularies of several models joined: tokens, rows of tables, chat templates."""
