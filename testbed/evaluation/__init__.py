"""Quality of a trained model on the user's own data, on the controller: what `testbed evaluate` computes.

a run, or a model's folder ─► Subject (subject.py) ─┐
a file, or a suite ─► items (items.py, texts.py) ───┴─► Outcome of the trained model, and of the base model
                                                        (choices, generation, perplexity, classes, harness)
                                                    ─► Evaluation, kept in the run's folder (record.py)
"""
