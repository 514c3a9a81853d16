"""Write a report of a run that a reviewer can check (`pages.write_report`); what draws it is the extra ``report``."""
