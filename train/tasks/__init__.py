"""What is trained. A task is a package of this folder; nothing outside of it changes for a new one.

Its `__init__.py` is light (no torch) and has

    Settings            the keys of the config's `task` section: a subclass of train.config_sections.TaskConfig
    load()              the task's class, a train.tasks.base.Task
    check_config        optional: raises ValueError if another section of the config does not go with the task
    check_dataset       optional: raises ValueError if the dataset (its manifest) is not one for the task
    order               optional: order(config, split, seed, global_batch, micro_batch), the data_pipeline.order.Order
                        in which the split's samples are used; by default one of all samples
    report_sections     optional: what launch/report.py shows of an evaluation (see classification)

`train.task_registry.register(name, module)` adds a task whose package is elsewhere.
"""
