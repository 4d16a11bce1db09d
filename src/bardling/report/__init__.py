"""Pictures of finished and running runs, and the baselines drawn with them, computed from run folders alone; and of scores
that a caller has measured.

Writing metrics (`monitor/`) and measuring models (`evaluate/`) do not belong here.
"""
