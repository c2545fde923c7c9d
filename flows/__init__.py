"""Prefect flows: plan, train, retrain. A flow reads as the sentence it carries out."""
