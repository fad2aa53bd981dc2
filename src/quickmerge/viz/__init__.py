"""Drawing: maps of tokens and patches, charts, and self-contained pages.

The builder of any page, and its blocks, are in `quickmerge.viz.page`.
"""
