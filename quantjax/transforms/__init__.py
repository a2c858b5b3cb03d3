"""The verbs: functions of functions. State always goes in and comes out.

Each module is named after its verb, so nothing is re-exported here; ``quantjax`` itself does that.
"""
