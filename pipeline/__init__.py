"""Workflows as durable DAGs: specification, planner, artifact store, journal, engine, executors, tracking, CLI.

What users import of it is in `polytrope` itself: `from polytrope import run, stage, StageContext, Artifact`.
"""
