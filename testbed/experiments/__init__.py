"""Experiments: a matrix of runs from one file, foretold, run, judged.

file        the YAML file, read and checked; choices are the values along its axes
experiment  the cells, and what tells them apart
cells       where each stands; done one after another, with the pace that is left
tables      what came of it: the report's tables (`testbed.reports`), printed, and as JSON
forecast    what it will take: from runs that are there, from the plan, from a step that is timed
"""
