"""Prefect flows: plan, train, retrain. How a run goes is said in geotrain.run; here its stages are tasks."""
