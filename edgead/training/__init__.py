"""Data sets, distillation, training and calibration; torch is needed by all but the modules for data."""
