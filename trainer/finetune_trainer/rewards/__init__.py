"""Rewards of completions: reward models, functions by import path, exact matches and patterns.

Each is a callable with the signature of TRL's reward functions, `(prompts, completions, completion_ids, **columns)`,
where all arguments are lists with an entry per completion; it returns a list of numbers. Prompts are strings or lists
of messages; a completion is a string or a list of one message, like its prompt.
"""
