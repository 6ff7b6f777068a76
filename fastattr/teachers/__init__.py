"""Teachers: score training images for a query by what the generator's own losses and gradients say.

Every teacher answers one question, `score(query, candidates)`, higher = more influential, and writes one score table.

config      `TeacherConfig`: the settings, which say which teacher
unlearning  `query_step`, `exact_scores`: AbU+ exactly; `linearised_scores`: to first order, one pass for all queries;
            `refined_inverse`: conjugate gradients beyond EKFAC's inverse
kernels     `similarity_scores`, `kernel_scores` (TRAK, D-TRAK), `averaged`: from features to scores;
            `retraining_scores`: a teacher corrected by models that were trained without some images
fitted      `FittedTeacher`: what all queries share, kept; `score(image, prompt)` scores a new one over the corpus
teach       `run(config, run_dir)`: the stage `fastattr teach`, one function a method; `task`: what they share
scores      `read_scores`, `write_shard`: the score table
cost        `teacher_plan`: what the stage needs, from the settings alone

Reads corpus/, generator/, queries/ and candidates/ of a run folder; writes scores/ and, for the next run, encoded/, ekfac/,
base_loss/ and gradients/.
"""
