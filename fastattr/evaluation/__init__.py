"""Is it true? Agreement with the teacher, and with what retraining without images does.

    against_teacher  `run`, `EvaluateConfig`: a student's rankings against its teacher's; writes evaluation/metrics.json.
    lds              the linear datamodeling score, plain and residual, with intervals and noise ceiling: arrays only.
    subsets          `RetrainConfig`: which models are retrained, and which images each of them lacks.
    retrain          `prepare`, `train`, `measure`, `run_all`: train them, from scratch, a process each, and take the queries'
                     losses under them; writes RUN/shared, RUN/models.
    record           `make_ground_truth`: all of it, in order; writes a ground truth folder.
    truth            `GroundTruth`: a ground truth folder, opened. Its losses say what retrained models think of each query.
    against_truth    `run_truth` (`fastattr evaluate METHOD --truth FOLDER`), `compare_with_truth`, figures.
    showcase         what the page shows beyond an attributor's answers: generated.parquet, counterfactuals.parquet.

Higher scores mean more influential. Every comparison keeps to the queries of one split and matches images by id.
"""
