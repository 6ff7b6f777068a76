"""Students: small networks that learn the teacher's order, and the calibration that says how much of it to believe.

Reads scores/, features/ and query_features/; writes student/ and calibration/.

- `student`: the network, `Student`; `light`: the same in NumPy, for answers without torch.
- `pairs`: score tables as targets; `distill`: losses, training, `run` (`fastattr distill`).
- `ranking`: mAP, NDCG, Spearman's correlation and paired intervals.
- `calibration`: similarity to percentile and influence, `load_calibration`; `calibrate`: `run` (`fastattr calibrate`).
- `shares`: how a query's influence divides among creators, collections or any column.
- `ownness`: whether an image and its prompt look like what the generator makes.
"""
