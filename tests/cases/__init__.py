"""Small inputs that once failed, and what each must give: one check a case, run by benchmarks/cases.py and test_cases.py."""
