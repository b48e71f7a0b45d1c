"""The engines, each imported only when it is used; `promptdrop.engine` has the table."""
