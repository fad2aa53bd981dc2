"""The doors: how programs of others, which know nothing of quickmerge, run a model with a recipe.

Each is a module or a folder of its own, and imports the other program only when it is used.
"""
