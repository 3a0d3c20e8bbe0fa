"""Predictors: how long will it take. Pure plug-ins; the table is PREDICTORS."""
