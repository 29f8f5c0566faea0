"""One module per scheduler: `find(variables)` answers with the nodes of the job, or why this is no such job."""
