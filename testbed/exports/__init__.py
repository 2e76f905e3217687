"""Runs taken elsewhere: tables of Parquet, CSV or JSON, models with cards, MLflow, Weights & Biases.

folder     an export's folder: what is written where, and over what
schema     the tables and their columns, with units and meanings
rows       the rows of every table, from a run's folder
files      tables as files
model      a run's trained model, with its card
tracking   what a tracker is told of a run; mlflow and wandb tell it, through their own clients
"""
