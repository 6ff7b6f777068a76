"""Is it true? Agreement with the teacher, and with what retraining without images does.

    against_teacher  `run`: a student's rankings against its teacher's; reads scores/, features/, query_features/, student/,
                     writes evaluation/metrics.json. `EvaluateConfig`.
    lds              the linear datamodeling score, plain and residual, with intervals and noise ceiling: arrays only.
    subsets          `RetrainConfig`: which models are retrained, and which images each of them lacks.
    retrain          `prepare`, `train`, `run_all`: train them, from scratch, a process each; writes RUN/shared, RUN/models.
    measure          `measure`: the queries' losses under a model, and what it draws from their noise.
    record           `make_ground_truth`: all of it, in order; writes a ground truth folder.
    truth            `GroundTruth`: a ground truth folder, opened. Its losses say what retrained models think of each query.
    against_truth    `run_truth` (`fastattr evaluate METHOD --truth FOLDER`), `compare_with_truth`, `leave_k_out_gains`: any
                     method's scores against a ground truth; writes metrics.json and figures.
    figures          `write_truth_report`: the figures of a comparison with the truth.
    showcase         what the page shows beyond an attributor's answers: generated.parquet, counterfactuals.parquet.

Higher scores mean more influential. Every comparison keeps to the queries of one split and matches images by id.
"""
