"""QuickMerge++ and the methods beside it: fewer tokens in language, vision and vision-language models.

`tokens` holds the maths without any model, `reducers` one method a file, `prior` the learnt half of QuickMerge++;
`text`, `vision` and `visual` are where a model is made to read fewer tokens. ``merge.prior`` stands on
`quickmerge.calm.heads`.
"""
