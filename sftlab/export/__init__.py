"""Export the merged model of a run in the formats of other programs, and test what is exported."""
