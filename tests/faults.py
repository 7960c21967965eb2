"""Thirty-nine faults that end or falsify a training run, and the tests that show what happens here.

`pytest -m faults` runs these tests (conftest.py marks them); test_faults.py checks that each fault
has one. The faults were collected from public issues of this trade and from the code released with
the paper; most of them end or falsify a run there.
"""

FAULTS = {
    1: ("a file that a fresh clone lacks", ["test_every_command_of_the_documents_and_headers"]),
    2: ("no judge at the start", ["test_no_judge_at_the_address_is_said_before_anything"]),
    3: ("the judge dies in the middle", ["test_a_dying_judge_stops_the_run_after_a_checkpoint"]),
    4: ("the judge is silent, or drips", ["test_all_requests_together_have_a_time_too"]),
    5: ("neither yes nor no", ["test_neither_yes_nor_no_is_no_score"]),
    6: ("Yes, YES and a blank before yes", ["test_every_spelling_of_yes_and_no_counts"]),
    7: ("a request is refused", ["test_a_judge_that_gives_no_answer_gives_no_score"]),
    8: ("the judge is busy", ["test_a_busy_judge_is_given_the_time_it_asks_for"]),
    9: ("two errors, then an answer", ["test_two_errors_and_then_an_answer_is_an_answer"]),
    10: ("half a reply, or one of another form", ["test_a_judge_that_gives_no_answer_gives_no"]),
    11: ("an answer that WISE cannot read", ["test_an_answer_is_read_or_it_is_none"]),
    12: ("one item fails", ["test_one_failing_picture_leaves_the_others_their_scores"]),
    13: ("one NaN in a group", ["test_a_failed_score_gets_no_advantage"]),
    14: ("a group of one, or of equals", ["test_a_unanimous_group_gives_no", "test_bad_usage_is"]),
    15: ("a gradient that is not finite", ["test_a_step_whose_gradient_is_not_finite_is_not"]),
    16: (
        "out of memory",
        ["test_rollouts_that_do_not_fit_are_sampled", "test_a_step_that_does_not_fit_into_memory"],
    ),
    17: ("SIGTERM or Ctrl-C", ["test_a_signal_ends_with_a_checkpoint"]),
    18: ("killed while it saves", ["test_a_kill_while_saving_leaves_the_checkpoint_before"]),
    19: ("killed and resumed", ["test_a_killed_run_resumes_as_if_nothing_had_happened"]),
    20: ("pictures stopped half-way", ["test_pictures_are_laid_out_as_geneval_reads_them"]),
    21: (
        "resumed with other flags or inputs",
        ["test_a_resumed_run_keeps_its_flags", "test_a_resumed_run_has_the_same_prompts"],
    ),
    22: ("a full disk", ["test_a_checkpoint_that_cannot_be_written", "test_a_file_that_cannot_be"]),
    23: ("the shipped prompt file", ["test_prompt_files_are_recognised_by_their_content"]),
    24: ("a malformed row", ["test_a_bad_prompt_file_is_one_clear_error"]),
    25: ("an unknown place", ["test_odd_fields_cost_one_score_and_are_counted", "test_places"]),
    26: ("a prompt that is no file name", ["test_a_prompt_that_cannot_be_a_file_name_is_refused"]),
    27: ("a prompt of over 100 letters", ["test_names_of_the_released_code_are_recognised"]),
    28: ("a damaged or odd picture", ["test_a_bad_picture_is_refused", "test_evaluate_keeps"]),
    29: ("HTML in a prompt", ["test_every_text_in_a_page_is_escaped"]),
    30: ("a formula in a table", ["test_no_table_is_written_for_a_spreadsheet"]),
    31: ("a pickle that executes code", ["test_a_checkpoint_that_executes_code_is_refused"]),
    32: ("text that is evaluated", ["test_nothing_that_is_read_is_executed"]),
    33: ("a model with code of its own", ["test_nothing_that_is_read_is_executed"]),
    34: ("weights that do not fit", ["test_a_missing_part_is_refused_and_named"]),
    35: (
        "a process of two dies, or their launcher",
        ["test_a_dead_process_ends_the_others", "test_a_killed_launcher_leaves_no_process"],
    ),
    36: ("two runs in one folder", ["test_a_signal_ends_with_a_checkpoint_and_a_second_run"]),
    37: ("forking beside CUDA", ["test_nothing_that_is_read_is_executed"]),
    38: ("another judge than before", ["test_a_model_that_is_not", "test_a_resumed_run_has"]),
    39: (
        "a score out of range",
        ["test_a_score_out_of_range_is_a_counted_failure", "test_a_reward_of_the_wrong_length"],
    ),
}


def shows_a_fault(name):
    """Is this the name of a test that is listed above? (Listed by how it begins.)"""
    return any(name.startswith(test) for _, tests in FAULTS.values() for test in tests)
