"""What can be known to fail before anything starts: every stage's model, data and settings, all faults at once.

`job` puts them together. The data's part needs none of the libraries that the model's takes seconds to import, so on a
cluster the two are looked for side by side.
"""
