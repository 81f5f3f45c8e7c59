-- Beside the database that POSTGRES_DB names: both keep their version in a table of one name.
CREATE DATABASE mlflow;
