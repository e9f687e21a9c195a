"""What answers are worth: reward models, functions by import path, right answers and patterns.

Each is a callable with the signature of TRL's reward functions, `(prompts, completions, completion_ids, **columns)`,
all lists with an entry per answer, to a list of numbers. Prompts are strings or lists of messages; a completion is a
string or a list of one message, as its prompt is.
"""
