"""The memory frontier: the largest submodel, batch and length that a device holds with a method.

record    the nouns, as they are kept in the runs' folder
axes      what is varied
search    bisection, over a prediction or over trials
trials    real jobs under the real cap
finding   a whole frontier: predicted, and confirmed where asked for
table     how it is printed
"""
